"""minilora: LoRA from scratch, in pure PyTorch, that teaches a Gemma chat model to call functions.

Read it in this order; a file imports only from those above it.

    jsontext.py     JSON as text, read strictly
    config.py       every setting and its default: Gemma's shape, LoRA, a run, decoding
    files.py        files and folders, whole or not at all
    linear.py       x Wᵀ by the fastest kernel that PyTorch has for it
    lora.py         W frozen, A and B trained; attach, merge, unmerge: the idea on one screen
    embedding.py    the tied table, and new tokens as a few trainable rows beside it
    attention.py    what a query may see, and the attention that honours it
    recompute.py    what autograd keeps of a layer, and what backward makes again
    model.py        Gemma 1, 2 and 3, from RMSNorm to hidden states
    weights.py      safetensors to model, strict both ways; the hub
    tokenizer.py    SentencePiece and new tokens; text never turns into control tokens
    notation.py     what a dialect is: tokens, blocks, how calls are written and read again
    dialects.py     Hermes, Mistral, FunctionGemma: a table for each
    chat.py         conversations and tools to ids with a kind each; replies to tool calls
    report.py       metrics, progress, curves; text that may be shown
    sources.py      what --data may name, and the rows in it
    formats.py      how published sets write calls, tools and schemas
    readers.py      many layouts of rows to conversations
    data.py         conversations to examples to packed batches
    cache.py        examples on disk, found again by what they were made from
    loss.py         chunked cross-entropy over what the assistant must write
    trainer.py      new rows, schedule, optimizer step, held-out loss
    estimate.py     what a run will need, told from the model's shape
    check.py        bad rows, what the others hold, a mended copy
    patterns.py     which linears an adapter of peft means
    checkpoint.py   adapters in peft's layout, merged export
    state.py        all that a run needs to go on
    schema.py       what single words of a JSON schema mean
    grammar.py      what a reply may be: a dialect and JSON schemas as a grammar
    automaton.py    the grammar read byte by byte: what may come next, how far the end is
    constrain.py    which ids may come next, so that no call is malformed
    generate.py     cached decoding
    tools.py        Python functions as tools; think, call, observe, answer
    compare.py      are these calls right?
    bfcl.py         questions with what is right: own conversations, the leaderboard's files
    evaluate.py     tool-call accuracy: decoded for real, by category, before and after
    view.py         tokens by kind: in colours, as a list, as a page
    hub.py          the model card, and its way to the hub
    bench.py        what this machine gives: steps, decoding, loading, merging
    __main__.py     python -m minilora …
    nano/           the built-in base, its data, and the script that made both

`train.py` and `infer.py`, beside the package, are the two programs that use it.
"""

__version__ = "0.1.0"
