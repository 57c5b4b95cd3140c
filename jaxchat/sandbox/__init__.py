"""Programs that nobody has read, run apart from what judges them. `run.judge` is the way in.

    ours, JAX in it --job--> judge.py, a process --calls, literals--> inside.py, a process behind a wall
                    <--verdict--               <--values, literals--

`judge.py` runs the test, whose text we trust, with a stand-in for the function under test; `inside.py` has the function
and never sees the test. The two, and what they import, need nothing but the standard library, so they start quickly.
"""
