"""A checkpoint on the Hugging Face hub."""
