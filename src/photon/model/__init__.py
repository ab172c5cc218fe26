"""The decoder that is trained, and the way in from and out to Hugging Face."""
