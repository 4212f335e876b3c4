"""A plain implementation with the published algorithm's cost, for the benchmarks to compare with.

Written from a description of the published training and generation, not from its source. Its
thoughts and its loss equal those of Coconut with a window of one state (tests/test_benchmarks.py),
so the work is the same. Its cost comes from

- splitting the batch's embeddings into one tensor per position and stacking them again in every
  latent pass, for which the backward pass makes a whole gradient per position: quadratic in
  records x length;
- asking the device for the position of every latent, one number at a time;
- computing vocabulary logits at every position, and keeping every layer's states;
- in generation, encoding the whole sequence again for every new token, one record at a time.

Shapes: B batch, T tokens, D width, V vocabulary, K latents.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel


class Published(nn.Module):
    """A Hugging Face causal LM that reads the previous hidden state at each latent position.

    base_causallm, latent_token_id, eos_token_id: as for Coconut.
    """

    def __init__(self, base_causallm: PreTrainedModel, latent_token_id: int, eos_token_id: int):
        super().__init__()
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.eos_token_id = eos_token_id

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss (), the embeddings with thoughts (B, T, D) and the logits (B, T, V).

        Takes a batch laid out as for Coconut.forward, with adjacent latents: the first latent of
        every row is in the same column.
        """
        latents = self.latent_columns(input_ids)
        num_passes = 1 + max(map(len, latents))
        T = input_ids.size(1)
        embeds = self.base_causallm.get_input_embeddings()(input_ids)
        cache = DynamicCache(config=self.base_causallm.config)
        begin, stop = 0, min((row[0] for row in latents if row), default=T)
        all_logits = []
        for pass_index in range(num_passes):
            stop = T if pass_index == num_passes - 1 else stop
            output = self.base_causallm(
                inputs_embeds=embeds[:, begin:stop],
                attention_mask=attention_mask[:, :stop],
                position_ids=position_ids[:, begin:stop],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            all_logits.append(output.logits)
            if pass_index < num_passes - 1:
                columns = [row[pass_index] if pass_index < len(row) else None for row in latents]
                embeds = self.restack(embeds, output.hidden_states[-1], columns, begin)
            begin, stop = stop, stop + 1
        logits = torch.cat(all_logits, 1)
        predictions, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        loss = F.cross_entropy(predictions.view(-1, logits.size(-1)), targets.view(-1))
        return loss, embeds, logits

    def latent_columns(self, input_ids: Tensor) -> list[list[int]]:
        """The columns of each row's latents."""
        latents: list[list[int]] = [[] for _ in input_ids]
        for place in (input_ids == self.latent_token_id).nonzero():
            latents[place[0].item()].append(place[1].item())
        return latents

    def restack(
        self, embeds: Tensor, hidden_states: Tensor, columns: list[int | None], begin: int
    ) -> Tensor:
        """`embeds` (B, T, D) with one more thought per row, rebuilt from single positions.

        hidden_states: (B, n, D), of the columns from `begin` on.
        columns: the column of each row's thought; None for a row that has no more.
        """
        B, T, _ = embeds.shape
        pieces = [[embeds[row, column] for column in range(T)] for row in range(B)]
        for row, column in enumerate(columns):
            if column is not None:
                pieces[row][column] = hidden_states[row, column - 1 - begin]
        return torch.stack([torch.stack(row) for row in pieces])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Token ids (1, T + new), int64: the prompt (1, T) and the greedily decoded tokens."""
        mask = torch.ones_like(input_ids)
        _, embeds, logits = self(input_ids, mask, input_ids.clone(), mask.cumsum(1) - 1)
        tokens = input_ids[0].tolist()
        for number in range(max_new_tokens):
            if number > 0:
                logits = self.base_causallm(inputs_embeds=embeds).logits
            token = logits[0, -1].argmax().item()
            tokens.append(token)
            if token == self.eos_token_id:
                break
            new = torch.tensor([[token]], device=input_ids.device)
            embeds = torch.cat([embeds, self.base_causallm.get_input_embeddings()(new)], 1)
        return torch.tensor([tokens], device=input_ids.device)
