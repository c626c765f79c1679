"""Trackers: callbacks that write a training down for other programs."""
