"""Losses: pure functions of arrays. Each returns the value over all devices of `axis_name`."""
