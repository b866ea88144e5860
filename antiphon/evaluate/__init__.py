"""Whether a checkpoint computes and says what it should."""
