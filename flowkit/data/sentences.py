"""Short plain sentences for voices to read, written for this purpose."""

from pathlib import Path

SENTENCES = Path(__file__).with_suffix(".txt").read_text().splitlines()
