"""OPT on text: a language model on packed blocks."""
