"""The axis algebra: expressions of what an axis is made of, and their unification.

`expressions` are values; `union_find` holds what is known of their atoms; `splitting`, `unification`, `concatenation`
and `settling` are functions that take it and change it; `algebra` is the face that rules see. Each of them leaves sound
what it found sound: the function of the model stays, whatever a rule asks for.
"""
