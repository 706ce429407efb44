"""model.py's command line: chats on a terminal, answers to a file of prompts, sampling options."""
import io
import json
import os
import shutil
import sys

import pytest
import torch

import configs
import launch
import model as M
from conftest import ROOT

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def with_template(folder, template):
    """A copy of the embedded model with a chat template. Its answers are words, but no sense."""
    shutil.copytree(ROOT / "data" / "base", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("chat") / "model", CHATML)


def answers_to(folder, *prompts, **sampling):
    """The answers to prompts (texts, or lists of messages), one at a time."""
    generator = M.Generator(folder, M.OPTIONS | {"max_tokens": 12} | sampling)
    texts = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        [ids] = M.generate_all(generator.model, [generator.encode(messages)], stop=generator.stop, **generator.sampling)
        texts.append(generator.tokenizer.decode(ids))
    return texts


def test_chat_on_a_terminal_remembers_turns(chat_model):
    """Two turns, /reset, /system, an unknown command, Ctrl-C at the prompt, Ctrl-D."""
    hello, again, system = ({"role": role, "content": text} for role, text in (
        ("user", "hello there"), ("user", "again"), ("system", "Be brief.")))
    sampling = {"temperature": 1.0, "top_k": 20, "seed": 3}
    first, brief = answers_to(chat_model, [hello], [system, hello], **sampling)
    [second] = answers_to(chat_model, [hello, {"role": "assistant", "content": first}, again], **sampling)
    assert len({first, second, brief}) == 3
    terminal = launch.Terminal("model.py", str(chat_model), "max_tokens=12", "temperature=1.0", "top_k=20", "seed=3")
    terminal.read_until("Ctrl-D the chat\n> ")
    for line, shown in (("hello there", first), ("again", second), ("/reset", None), ("hello there", first),
                        ("/system Be brief.", None), ("hello there", brief), ("/reset", None), ("hello there", brief),
                        ("/system", None), ("hello there", first), ("/help", M.COMMANDS)):
        terminal.type(f"{line}\n")
        assert terminal.read_until("\n> ") == f"{line}\n" + (f"{shown}\n> " if shown else "> ")
    terminal.interrupt()
    terminal.read_until("\n> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_ends_an_answer_at_ctrl_c(chat_model):
    """The answer that was cut off is no turn."""
    [first] = answers_to(chat_model, "hello there")
    terminal = launch.Terminal("model.py", str(chat_model), "max_tokens=400")
    terminal.read_until("Ctrl-D the chat\n> ")
    os.setpriority(os.PRIO_PROCESS, terminal.pid(), 19)  # this test comes first on a busy machine
    terminal.type("What is 3 + 4?\n")
    terminal.read_until("\n")
    terminal.read_until(" ")                             # an answer has begun
    terminal.type("\x03")
    assert len(terminal.read_until("\n> ")) < 300
    terminal.type("hello there\n")
    assert terminal.read_until(first) == f"hello there\n{first}"
    terminal.type("\x03")
    terminal.read_until("\n> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_reports_what_the_template_and_the_context_lack(tmp_path, monkeypatch, capsys):
    """A system message that the template leaves out or refuses, and a chat that is too long."""
    silent = with_template(tmp_path / "silent", CHATML.replace("in messages", "in messages if m.role != 'system'"))
    refusing = with_template(tmp_path / "refusing", "{% if messages[0].role == 'system' %}"
                             "{{ raise_exception('no system') }}{% endif %}" + CHATML)
    lines = ["/system Be brief.", "hello " * 100, "hi"]
    for folder, error in ((silent, "leaves out system messages"), (refusing, "no system")):
        given = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt: next(given, None) or raise_eof())
        M.chat(M.Generator(folder, M.OPTIONS | {"max_tokens": 3}))
        shown = capsys.readouterr().out.splitlines()
        assert error in shown[1] and "a prompt must have 1 to 511 tokens" in shown[2]
        assert shown[3] == answers_to(folder, "hi", max_tokens=3)[0]


def raise_eof():
    raise EOFError


def test_main_answers_each_line_of_stdin(chat_model, monkeypatch, capsys):
    """Without a terminal, each line is a prompt of its own; a model without a template continues it."""
    for folder, beginning in ((chat_model, ("", "")), (ROOT / "data" / "base", ("hello", "Please"))):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n  Please \n"))
        M.main([str(folder), "max_tokens=12"])
        expected = [first + answer for first, answer in zip(beginning, answers_to(folder, "hello", "Please"))]
        assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
        M.main([str(folder), "hello", "max_tokens=12"])
        assert capsys.readouterr().out == expected[0] + "\n"


def test_answer_file_writes_the_records_with_their_answers(chat_model, tmp_path, capsys):
    """In the order of the file, whatever the batch; an answer that a chat already has is not a prompt."""
    user = {"role": "user", "content": "Say hi."}
    system = {"role": "system", "content": "Be brief."}
    records = [{"prompt": "hello", "id": 7}, {"messages": [system, user, {"role": "assistant", "content": "hi"}]},
               {"prompt": [user], "answer": "x"}, {"question": "Please add 3 and 4.", "answer": "7"}]
    prompts = ["hello", [system, user], [user], "Please add 3 and 4."]
    expected = answers_to(chat_model, *prompts)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "\n")
    (tmp_path / "a.txt").write_text("hello\n\nPlease add 3 and 4.\n")
    out = tmp_path / "out.jsonl"
    for size in (1, 3):
        M.main([str(chat_model), f"prompts={tmp_path / 'a.jsonl'}", f"out={out}", "max_tokens=12", f"batch_size={size}"])
        written = [json.loads(line) for line in out.read_text().splitlines()]
        assert written == [record | {"generated_text": text} for record, text in zip(records, expected)]
        assert capsys.readouterr().out == f"4 answers: {out}\n"
        out.unlink()
    M.main([str(chat_model), f"prompts={tmp_path / 'a.txt'}", "max_tokens=12"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"prompt": "hello", "generated_text": expected[0]}, {"prompt": "Please add 3 and 4.", "generated_text": expected[3]}]
    # sampled: each prompt has a seed of its own, whatever the batch
    expected = [answers_to(chat_model, prompt, temperature=1.5, seed=3 + i)[0] for i, prompt in enumerate(prompts)]
    assert len(set(expected)) == 4
    for size in (1, 4):
        M.main([str(chat_model), f"prompts={tmp_path / 'a.jsonl'}", "max_tokens=12", f"batch_size={size}",
                "temperature=1.5", "seed=3"])
        assert [json.loads(line)["generated_text"] for line in capsys.readouterr().out.splitlines()] == expected


def test_answer_file_names_the_line_of_a_bad_prompt(chat_model, tmp_path):
    path = tmp_path / "a.jsonl"
    for line, words in (('{"prompt": ', "line 2: .*not valid JSON"), ('{"text": "a"}', "line 2: .*this is text"),
                        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: has no prompt"),
                        (json.dumps({"prompt": "a" * 600}), "line 2: the prompt has .* must have 1 to 511")):
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(configs.UserError, match=words) as e:
            M.main([str(chat_model), f"prompts={path}"])
        assert str(path) in str(e.value)


def test_parse_arguments_takes_sampling_from_generation_config(chat_model, tmp_path):
    """A model that samples does so here; what the user sets wins; other models are greedy."""
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    config = {"do_sample": True, "temperature": 1, "top_p": 0.8, "top_k": 20, "max_new_tokens": 40, "eos_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(config))

    def sampling(*argv):
        options = M.parse_arguments([str(folder), *argv])[2]
        return [options[key] for key in ("temperature", "top_p", "top_k", "max_tokens")]
    assert sampling() == [1.0, 0.8, 20, 40]
    assert sampling("temperature=0.5", "max_tokens=9") == [0.5, 0.8, 20, 9]
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": False, "max_new_tokens": None}))
    assert sampling() == [0.0, 1.0, 0, 256]


@pytest.mark.parametrize("argument, words", [
    ("device=tpu", "device: must be one of auto, cpu, cuda"), ("dtype=bf16", "dtype: must be one of auto, float32"),
    ("prompts=a.csv", "prompts: must be a .jsonl or .txt"), ("out=new", "out: has no effect without prompts"),
    ("batch_size=0", "batch_size: must be at least 1"), ("temp=1", "temp=1: is not an option")])
def test_parse_arguments_refuses(chat_model, argument, words):
    with pytest.raises(configs.UserError, match=f"^{words}"):
        M.parse_arguments([str(chat_model), argument])
    with pytest.raises(configs.UserError, match="out: .*exists; name another"):
        M.parse_arguments([str(chat_model), f"out={chat_model}", "prompts=a.txt"])


@torch.no_grad()
def test_load_in_bfloat16_stores_matrices_in_it(chat_model):
    """The logits are those of fp32 up to rounding; vectors stay in fp32."""
    model, _ = M.load(chat_model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.dim() == 2} == {torch.bfloat16}
    assert model.norm.weight.dtype == torch.float32
    batch = M.pack_prompts([list(range(40, 80))])
    logits, exact = (m.logits(batch) for m in (model, M.load(chat_model)[0]))
    assert logits.dtype == torch.float32 and 0 < float((logits - exact).norm() / exact.norm()) < 0.02
    ids = M.generate_all(model, [[40, 50]], 5, [])[0]
    assert len(ids) == 5


def test_choose_device_takes_a_gpu_and_bf16_if_there_are(monkeypatch):
    options = {"device": "auto", "dtype": "auto"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert M.choose_device(options) == ("cpu", torch.float32)
    assert M.choose_device(options | {"dtype": "float16"}) == ("cpu", torch.float16)
    with pytest.raises(configs.UserError, match="^device: cuda is not available"):
        M.choose_device(options | {"device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=has_bf16: answer)
        assert M.choose_device(options) == ("cuda", dtype)
    assert M.choose_device(options | {"device": "cpu"}) == ("cpu", torch.float32)
