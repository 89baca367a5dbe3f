"""What passes put into graphs: thresholds, packs, leaves that save less, memory orders."""
