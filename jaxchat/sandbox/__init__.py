"""Sandbox that runs untrusted programs in a process separate from their tests. The entry point is `run.judge`.

    caller, imports JAX --job--> judge.py, a process --calls, literals--> inside.py, a sandboxed process
                        <--verdict--               <--values, literals--

`judge.py` runs the test, which is trusted, with a proxy for the function under test; `inside.py` runs the function and
never sees the test. Both import only the standard library, so that they start quickly.
"""
