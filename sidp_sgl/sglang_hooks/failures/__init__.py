"""A rank dies: who does what, in this order.

1. `reports`, in the DP controller: watches every rank's process from its start, and tells the main
   process of its end over the lifeline (`scheduler.lifecycle.liveness`). A rank that fails by
   itself has told its reason before.
2. `scheduler.lifecycle.guard`, in the main process: keeps the first failure, kills what is left of
   the engine and cancels every call that waits. It sees the controller and the detokenizer end too.
3. `pending`: makes of each cancelled call the error that its caller understands.
4. `engine`: makes the guard when an engine starts and closes it when it ends; stops a server, which
   exits with code 1.
5. `signals`: keeps SGLang, which sees the death as well, from killing the user's process.

The main process dies: every other process ends by itself, for its lifeline does, and `sockets` has
given nothing a name that would stay.
"""
