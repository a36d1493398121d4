"""Every change to SGLang's runtime, one module for each SGLang subsystem; ledger.md has a row for each hook.

Hooks are installed in two steps. When SGLang loads the plugin, only those in `arguments` and `install` go in: they
add the flags and attach the options. The rest follow in each process once it publishes server arguments that enable
DWDP (`install`), so a server without --enable-dwdp runs SGLang as it is.
"""
