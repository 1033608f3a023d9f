"""The exact meta-gradient, Difficulty-Net, and the accuracy of every class."""
