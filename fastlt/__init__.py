"""fastlt: long-tailed image recognition, fast and right."""

__version__ = "0.1.0"
