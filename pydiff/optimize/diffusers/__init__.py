"""What `optimize` knows of diffusers' models, one file a family."""
