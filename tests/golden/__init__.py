"""Golden numbers: what one commit computed, and the test that later commits compute the same."""
