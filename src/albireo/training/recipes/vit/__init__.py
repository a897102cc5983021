"""ViT on pictures: a model that tells classes apart."""
