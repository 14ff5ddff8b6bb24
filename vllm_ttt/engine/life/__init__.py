"""The life of a session, as one state machine.

``states.py``      the states, which of them may follow which, and the generation that never goes down
``operations.py``  of each session one operation at a time, in the order in which they were asked for
``tiers.py``       who comes into memory, and who is put away         ``orders.py``  what the worker is told to do with files
``saves.py``       who is written to the state dir, and when          ``exports.py`` adapters on their way to a client
``changes.py``     what an owner asks for: delete, reset, roll back, fork
``expiry.py``      sessions that nobody uses

An operation is a generator. It yields a Future where it must wait, and what it returns is the answer: nobody is answered before
the last line has run, and whatever it raises is the answer to that one call.
"""
