"""Losses: pure functions of arrays, each with the value over all devices of `axis_name`."""
