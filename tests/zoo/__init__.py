"""Whole architectures of torchvision and timm, converted and compared with torch.nn."""
