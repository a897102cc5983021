"""GPT-2 on instructions: a language model that answers."""
