"""Findings put into real scans that have none: a module for each anatomy."""
