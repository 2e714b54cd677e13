"""Hardening: what makes a model harder to attack, measured."""
