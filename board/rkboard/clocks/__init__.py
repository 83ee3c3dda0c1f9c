"""Clocks of CPU, NPU and memory: held while a command runs, and restored however it ends.

Only root may write clocks. So a keeper runs as root for as long as somebody is connected to it: systemd starts one for
each connection to a socket, or a command that runs as root starts its own. When the connection closes, as it does when
a process is killed, the keeper restores the clocks.
"""
