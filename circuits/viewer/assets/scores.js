/** Replacement and completeness, and influence, of any part of the graph; equal to those of Python. */
