"""The depth model: encoder, head, calibration, saving and graphs."""
