"""A package, so that a test file may be named as one in another folder (`test_card.py`)."""
