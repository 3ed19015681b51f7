"""What Goodstanding is compared with: the same cached read, as others write it, and bare servers as a measure."""
