"""Clocks of CPU, NPU and memory: held for the time of a command, and restored whatever becomes of it.

Only root may write them. So a keeper runs as root for as long as somebody is connected to it: systemd starts one for
each connection to a socket, or root does so itself. A connection that closes, also that of a process that was killed,
restores them.
"""
