"""What holds for all tests."""

import os

# No test may reach for the network; read once, when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
