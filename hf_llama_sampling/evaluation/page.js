"use strict";
(() => {
  const details = document.getElementById("details");
  let pinned = null;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function percent(logprob) {
    const value = 100 * Math.exp(Math.min(logprob, 0));
    if (value >= 99.95) return "100%";
    if (value >= 1) return value.toFixed(1) + "%";
    return value >= 0.0001 ? Number(value.toPrecision(3)) + "%" : value.toExponential(2) + "%";
  }

  const blanks = (text) => text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21B5").replaceAll("\t", "\u21E5");

  function list(pairs) {
    const made = element("dl");
    for (const [name, value] of pairs) made.append(element("dt", "", name), element("dd", "", value));
    return made;
  }

  function alternatives(data, place) {
    const made = element("ol", "alternatives");
    made.setAttribute("aria-label", "Most probable tokens here");
    for (const [id, logprob] of data.top[place]) {
      const item = element("li", id === data.ids[place] ? "own" : "");
      const bar = element("span", "bar");
      bar.style.width = 100 * Math.exp(Math.min(logprob, 0)) + "%";
      item.append(element("span", "name", blanks(data.names[id])), element("span", "value", percent(logprob)), bar);
      made.append(item);
    }
    return made;
  }

  function token(data, place, alone) {
    const logprob = data.logprobs[place];
    const rank = data.top[place].findIndex(([id]) => id === data.ids[place]) + 1;
    const count = data.top[place].length;
    const rows = [["token", (alone ? "" : blanks(data.names[data.ids[place]]) + ", ") + "id " + data.ids[place] + ", number " + (place + 1)]];
    if (logprob === null) {
      rows.push(["probability", "none: nothing stands before it"]);
    } else {
      rows.push(["probability", percent(logprob)], ["logprob", logprob.toFixed(3) + " (" + (-logprob / Math.LN2).toFixed(1) + " bits)"]);
      if (count) rows.push(["rank", rank ? String(rank) : "not among the best " + count]);
    }
    const made = element("div", "token-facts");
    made.append(list(rows));
    if (count) made.append(alternatives(data, place));
    return made;
  }

  function show(text, index) {
    const [start, first, last] = text.data.pieces[index];
    const cell = text.cells[index];
    const parts = [element("p", "piece mono", blanks(cell.textContent) || "(no character)")];
    const size = text.data.sizes[index];
    const where = size > 1 ? start + " to " + (start + size - 1) : size ? String(start) : "before " + start;
    const rows = [["offset", (size > 1 ? "characters " : "character ") + where]];
    if (last - first > 1) {
      const known = text.data.logprobs.slice(first, last).filter((value) => value !== null);
      rows.unshift(["tokens", last - first + ", together " + (known.length ? percent(known.reduce((a, b) => a + b)) : "no probability")]);
    }
    parts.push(list(rows));
    for (let place = first; place < last; place++) parts.push(token(text.data, place, last - first === 1));
    details.replaceChildren(...parts);
    details.parentElement.scrollTop = 0;
  }

  function enter(text, index) {
    text.cells[text.at].tabIndex = -1;
    text.at = index;
    text.cells[index].tabIndex = 0;
    text.cells[index].focus();
  }

  function pin(text, index) {
    if (pinned) pinned.text.cells[pinned.index].classList.remove("pinned");
    pinned = { text, index };
    text.cells[index].classList.add("pinned");
    show(text, index);
  }

  /* The cell on the next line, or the one before, that is nearest in the line's direction. */
  function beyond(text, down) {
    const here = text.cells[text.at].getClientRects()[0];
    if (!here) return text.at;
    const step = down ? 1 : -1;
    let line = null, best = text.at, least = Infinity;
    for (let index = text.at + step; index >= 0 && index < text.cells.length; index += step) {
      const box = text.cells[index].getClientRects()[0];
      if (!box || (down ? box.top < here.bottom - 2 : box.bottom > here.top + 2)) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > box.height / 2) break;
      const distance = Math.abs(box.left - here.left);
      if (distance < least) [best, least] = [index, distance];
    }
    return best;
  }

  function press(text, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = text.cells.length - 1;
    const moves = {
      ArrowRight: () => Math.min(text.at + 1, last),
      ArrowLeft: () => Math.max(text.at - 1, 0),
      ArrowDown: () => beyond(text, true),
      ArrowUp: () => beyond(text, false),
      Home: () => 0,
      End: () => last,
    };
    if (event.key in moves) {
      event.preventDefault();
      enter(text, moves[event.key]());
    }
  }

  for (const group of document.querySelectorAll(".text")) {
    const data = JSON.parse(document.getElementById(group.dataset.scores).textContent);
    const text = { data, cells: [...group.querySelectorAll(".t")], at: 0 };
    const places = new Map(text.cells.map((cell, index) => [cell, index]));
    const found = (event) => places.get(event.target.closest(".t"));
    group.addEventListener("keydown", (event) => press(text, event));
    group.addEventListener("focusin", (event) => {
      const index = found(event);
      if (index === undefined) return;
      if (index !== text.at) enter(text, index);
      pin(text, index);
    });
    group.addEventListener("mouseover", (event) => {
      const index = found(event);
      if (index !== undefined) show(text, index);
    });
    group.addEventListener("mouseleave", () => pinned && show(pinned.text, pinned.index));
    for (const button of document.querySelectorAll(`button[data-text="${group.id}"]`)) {
      button.addEventListener("click", () => enter(text, Number(button.dataset.cell)));
    }
  }
})();
