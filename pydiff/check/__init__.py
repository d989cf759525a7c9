"""What code does to a device, found without one: fake CUDA tensors, problems of a capture, counts of launches."""
