// Copies a matrix. Without this script the buttons stay hidden, and the matrices can be selected like any table.
(() => {
  "use strict";
  const told = new WeakMap();

  function tell(button, words) {
    clearTimeout(told.get(button));
    button.textContent = words;
    told.set(button, setTimeout(() => { button.textContent = "Copy"; }, 1600));
  }

  async function copy(button) {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      tell(button, "Copied");
    } catch { // a browser that does not let pages write: leave the matrix selected for the reader's own keys
      getSelection().selectAllChildren(button.previousElementSibling);
      tell(button, "Selected");
    }
  }

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }
  document.documentElement.dataset.drawn = "true";
})();
