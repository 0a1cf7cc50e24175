"""The report of a fusion: what is measured for it, its pictures, its page, and the files it consists of."""
