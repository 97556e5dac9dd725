"""Launches runs on this machine and on clusters, supervises them, and tests their fault tolerance."""
