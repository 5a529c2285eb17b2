"""What a pretrained network is worth: fine-tuned and frozen, on sentences and images, clean and under noise."""
