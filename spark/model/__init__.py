"""The SparK model: masks, encoder, densifying decoder, criterion, and all of them together."""
