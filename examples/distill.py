"""On-policy distillation of two models with one tokenizer: python distill.py STUDENT TEACHER"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from riskpo_kernels import linear_divergence

student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[1:3])
asked = AutoTokenizer.from_pretrained(sys.argv[1])("The sky is", return_tensors="pt")
teacher.requires_grad_(False)
head, their_head = (m.get_output_embeddings().weight for m in (student, teacher))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
for step in range(4):
    said = student.generate(**asked, do_sample=True, top_k=0, max_new_tokens=16, pad_token_id=0)
    pair = (m.get_decoder()(said[:, :-1]).last_hidden_state[0] for m in (student, teacher))
    ours, theirs = (h[asked.input_ids.shape[1] - 1 :] for h in pair)
    loss = linear_divergence(ours, head, theirs, their_head, kind="reverse_kl").mean()
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
    print(f"step {step}: {loss:.4f} nats from the teacher over {len(ours)} tokens")
