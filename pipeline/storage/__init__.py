"""Folders on disks and in buckets, and how writes to them stay atomic."""
