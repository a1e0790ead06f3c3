"""Certificates of devices and cloud: what pods ask for, and how the operator checks, signs and denies."""
