// Paints a small map of every block's write-space overlaps and lets a click on it choose the block that is shown large.
(() => {
  "use strict";
  const holder = document.querySelector(".maps");
  if (!holder) return;
  const blocks = JSON.parse(document.getElementById("chosen-blocks").textContent);
  const choice = document.getElementById("block-choice");
  const buttons = [...holder.querySelectorAll(".map")];
  // The colour scale of the large map (cividis), from 0 to the largest overlap of two different heads anywhere.
  const scale = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"].map(
    (color) => [0, 2, 4].map((at) => parseInt(color.slice(at, at + 2), 16)));
  let top = 0;
  for (const block of blocks) block.overlap.forEach((line, h) => line.forEach((value, g) => {
    if (g !== h) top = Math.max(top, value);
  }));

  function painted(share) {
    const place = Math.min(1, share) * (scale.length - 1);
    const low = Math.min(scale.length - 2, Math.floor(place));
    return scale[low].map((part, i) => part + (place - low) * (scale[low + 1][i] - part));
  }

  buttons.forEach((button) => {
    const overlap = blocks[button.dataset.block].overlap;
    const canvas = button.querySelector("canvas");
    const size = overlap.length;
    if (size) {
      canvas.width = canvas.height = size;
      const context = canvas.getContext("2d");
      const image = context.createImageData(size, size);
      overlap.forEach((line, h) => line.forEach((value, g) => {
        if (g !== h) image.data.set([...painted(top ? value / top : 0), 255], 4 * (h * size + g));
      }));
      context.putImageData(image, 0, 0);
    }
    button.addEventListener("click", () => {
      choice.selectedIndex = Number(button.dataset.block);
      choice.dispatchEvent(new Event("change"));
    });
  });
  const mark = () => buttons.forEach((button) => {
    button.setAttribute("aria-pressed", String(Number(button.dataset.block) === choice.selectedIndex));
  });
  choice.addEventListener("change", mark);
  mark();
  holder.hidden = false;
})();
