"""The systems that can be trained and exported: Shi et al. (PE) and RADnet (hemorrhage)."""
