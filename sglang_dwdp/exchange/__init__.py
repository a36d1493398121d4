"""Exchange steps: small forwards that the ranks of a group run together, moving tokens to experts.

A large forward copies peers' experts while it computes, and waits for nobody. A small one would wait for the link: its
few rows touch experts that are far larger than they are. So where every rank is about to run a small forward, they run
it *jointly*: in each MoE layer rows travel to the ranks that store their experts, and partial sums travel back.

    round.py    when a forward is joint: a pure state machine
    page.py     its state in shared memory, under a lock that outlives no rank (lock.py)
    policy.py   how long a rank waits for peers: pure, from measured times
    bells.py    how a rank that waits wakes idle peers that sleep
    meeting.py  one rank's side: enter, wait, run joint or alone
    inbox.py    how rows travel, as a protocol: host_inbox.py (CPU engine), flashinfer_inbox.py (NVLink)
    layer.py    one MoE layer of a joint forward
    joint.py    all of it, as the engine calls it

Set-up, by all ranks together, over a connected handshake:

    meeting = Meeting(share_page(handshake), times, share_bells(handshake))
    inbox = FlashInferInbox(handshake, num_experts, shape, layer_ids, meeting.page.lost)
    joint = JointForwards(meeting, inbox, limit_s)

Capture, for each bucket after its direct graph, on all ranks in one order: `with joint.capturing(bucket): …`. In a MoE
layer, `joint.bucket is not None` says that the forward is joint: call `joint.layer(…)` in place of its own experts,
whatever is being captured or run.

A step:

    round = joint.begin(bucket, rows)        # before the graph is chosen
    replay(direct graph of bucket, or joint graph of round.bucket)
    wait = joint.end(done)                   # done: an event recorded after the replay
    …
    wait()                                   # before the result is asked for, perhaps when the next step is launched

A rank with nothing to run, or that waits for a forward of its own (`joint.until`), calls `joint.begin(0)` again and
again, or when its bell rings; if that gives a round, it replays the MoE layers of `round.bucket` with rows of padding
only, whose ids are -1, beside its own forward. On an error of `begin`,
`layer` or `wait` joint forwards have ended for the group: `begin` gives None from then on, on every rank.
"""
