"""The 7,000 images of Fashion-MNIST that travel with the package; ``NOTICE`` holds their licence."""
