"""Train the bundled tiny LLAMA2-architecture model from a text file of plays, and write it with its model card.

    python examples/train_tiny_llama.py tinyshakespeare.txt hf_llama_sampling/tiny_llama

Speeches (blocks between blank lines) are the documents: each is `BOS speech EOS`, so that the model learns to stop.
Every 20th speech is held out. About eight minutes on two cores; the best held-out weights are kept.
"""

import argparse
import copy
import json
import math
import re
from pathlib import Path

import sentencepiece as spm
import torch
from tokenizers import decoders, normalizers, processors
from tqdm import trange
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

BLOCK, BATCH, PEAK_LR = 256, 16, 2e-3


def train_tokenizer(speeches: list[str], out: Path, vocab: int) -> spm.SentencePieceProcessor:
    """A SentencePiece BPE model of LLAMA2's structure: byte fallback, unk 0, bos 1, eos 2, no pad."""
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for speech in speeches for line in speech.splitlines()),
        model_prefix=str(out / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (out / "tokenizer.vocab").unlink()
    (out / "tokenizer.json").unlink(missing_ok=True)  # an earlier run's, of other pieces
    return spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def new_model(vocab: int) -> LlamaForCausalLM:
    """Six query heads over two key-value heads, embeddings tied: 1.8 million parameters."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    """Mean nats per token over whole documents, each scored alone from its BOS, EOS included."""
    total = count = 0.0
    for document in documents:
        ids = torch.tensor([document[: model.config.max_position_embeddings]])
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def unigram_loss(train: list[list[int]], held_out: list[list[int]], vocab: int) -> float:
    """The same figure for a model that knows only how often each token occurs (add-one smoothing)."""
    counts = torch.ones(vocab, dtype=torch.float64)
    for document in train:
        counts += torch.bincount(torch.tensor(document[1:]), minlength=vocab)
    logprobs = (counts / counts.sum()).log()
    tokens = torch.tensor([token for document in held_out for token in document[1:]])
    return -float(logprobs[tokens].mean())


def train_model(
    train: list[list[int]], held_out: list[list[int]], vocab: int, steps: int
) -> tuple[LlamaForCausalLM, float]:
    """AdamW with warm-up and cosine decay over shuffled documents; returns the best weights and their loss."""
    model = new_model(vocab)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
    )
    best, best_loss, stream = copy.deepcopy(model.state_dict()), math.inf, torch.empty(0, dtype=torch.long)
    bar = trange(steps)
    for step in bar:
        scale = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * scale
        while len(stream) < BATCH * BLOCK:  # a fresh shuffle of all documents each time the stream runs dry
            order = torch.randperm(len(train)).tolist()
            stream = torch.cat([stream, torch.tensor([token for i in order for token in train[i]])])
        ids, stream = stream[: BATCH * BLOCK].view(BATCH, BLOCK), stream[BATCH * BLOCK :]
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            now = held_out_loss(model.eval(), held_out)
            model.train()
            if now < best_loss:
                best, best_loss = copy.deepcopy(model.state_dict()), now
            bar.set_postfix(train=f"{float(loss.detach()):.3f}", held_out=f"{now:.3f}", best=f"{best_loss:.3f}")
    model.load_state_dict(best)
    return model.eval(), best_loss


def transformers_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The same pieces as a `tokenizer.json` that encodes as SentencePiece does: a space before each text, BOS first."""
    backend = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def write(model: LlamaForCausalLM, out: Path) -> None:
    """float16 safetensors plus tokenizer files, so that plain AutoModelForCausalLM and AutoTokenizer load it."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.half().save_pretrained(out)
    transformers_tokenizer(out).save_pretrained(out)
    # transformers 4 does not know the class name that transformers 5 writes; both know this one.
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def card(
    parameters: int,
    vocab: int,
    loss: float,
    unigram: float,
    speeches: int,
    held: int,
    chars_per_token: float,
    steps: int,
) -> str:
    """The model card; every figure in it comes from the run that wrote the weights."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny_llama

A LLAMA2-architecture model small enough to ship: {parameters:,} parameters, float16, 4 layers, 6 query heads over 2
key-value heads, tied embeddings, context 512; a SentencePiece BPE tokenizer of LLAMA2's structure ({vocab:,} pieces,
byte fallback, `unk` 0, `bos` 1, `eos` 2, no pad).

Trained by `examples/train_tiny_llama.py` on public-domain Shakespeare ({speeches:,} speeches, {held:,} of them held
out; {steps:,} steps of {BATCH} x {BLOCK} tokens). A document is one speech between BOS and EOS. It is there to try the
package, to test it and to show its numbers; it knows nothing.

| held-out loss | nats per token | bits per character |
|---|---|---|
| this model | {loss:.3f} | {loss / math.log(2) / chars_per_token:.3f} |
| unigram baseline | {unigram:.3f} | {unigram / math.log(2) / chars_per_token:.3f} |

Each held-out speech is scored alone from its BOS, its EOS included.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    speeches = re.split(r"\n{2,}", args.text.read_text(encoding="utf-8").strip())
    tokenizer = train_tokenizer(speeches, args.out, args.vocab)
    documents = [[tokenizer.bos_id(), *tokenizer.Encode(speech), tokenizer.eos_id()] for speech in speeches]
    train = [d for i, d in enumerate(documents) if i % 20]
    held_out = documents[::20]
    model, loss = train_model(train, held_out, args.vocab, args.steps)
    write(model, args.out)
    chars_per_token = sum(map(len, speeches[::20])) / sum(len(d) - 1 for d in held_out)
    unigram = unigram_loss(train, held_out, args.vocab)
    text = card(
        model.num_parameters(), args.vocab, loss, unigram, len(speeches), len(held_out), chars_per_token, args.steps
    )
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
