"""Node rules, and how they are carried out."""
