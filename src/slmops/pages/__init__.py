"""What the HTML reports of several steps share: one style, charts, numbers as people read them."""
