// The diff's section: the strongest examples of the latents it names.

const SHOWN = 2;

function drawTops() {
  for (const place of document.querySelectorAll("[data-examples]")) {
    const latent = latents.find((each) => each.id === Number(place.dataset.examples));
    if (!latent) continue;
    const strongest = data.examples[latent.index].filter((example) => example[3] === 0).slice(0, SHOWN);
    place.replaceChildren(...strongest.map(lineOf));
  }
}

// What the diff says of one latent, for its own view.
function diffOf(index) {
  if (!data.diff) return [];
  return [["diff", data.diff.class[index]], ["Δ", data.diff.difference[index]], ["decoder cosine", data.diff.cosine[index]]];
}
