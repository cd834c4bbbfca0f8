"""What several test modules use and no user needs; what a user needs too is in `palate.testing`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
