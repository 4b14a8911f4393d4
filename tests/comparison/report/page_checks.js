// What a reader would see: where each line of text is, and on which colour.
(() => {
  // The visible texts of the page with their elements, and the corners of their lines in pixels.
  function lines() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    for (let node; (node = walker.nextNode()); ) {
      const element = node.parentElement;
      if (!node.data.trim() || element.closest("script, title")) continue;
      if (!element.checkVisibility({ visibilityProperty: true })) continue;
      if (element.ownerSVGElement) {
        const { x, y, width, height } = element.getBBox();
        const matrix = element.getScreenCTM();
        const corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]];
        const quad = corners.map(([a, b]) => new DOMPoint(a, b).matrixTransform(matrix));
        found.push({ node, element, quad });
        continue;
      }
      const range = document.createRange();
      range.selectNodeContents(node);
      for (const { left, top, right, bottom } of range.getClientRects()) {
        const corners = [[left, top], [right, top], [right, bottom], [left, bottom]];
        found.push({ node, element, quad: corners.map(([x, y]) => ({ x, y })) });
      }
    }
    for (const line of found) {
      const ys = line.quad.map((p) => p.y);
      [line.top, line.bottom] = [Math.min(...ys), Math.max(...ys)];
    }
    return found.filter((line) => line.bottom > line.top).sort((a, b) => a.top - b.top);
  }

  // Whether two rectangles, turned or not, overlap by more than half a pixel.
  function overlap(one, other) {
    for (const quad of [one, other]) {
      for (const [p, q] of [[quad[0], quad[1]], [quad[1], quad[2]]]) {
        const length = Math.hypot(q.x - p.x, q.y - p.y);
        const along = (r) => ((q.x - p.x) * r.x + (q.y - p.y) * r.y) / length;
        const [a, b] = [one.map(along), other.map(along)];
        const shared = Math.min(Math.max(...a), Math.max(...b))
          - Math.max(Math.min(...a), Math.min(...b));
        if (shared <= 0.5) return false;
      }
    }
    return true;
  }

  const place = (element) =>
    element.closest("svg")?.getAttribute("aria-label") ?? element.closest("[id]")?.id ?? "";

  function overlaps() {
    const all = lines(), found = [];
    all.forEach((one, i) => {
      for (let j = i + 1; j < all.length && all[j].top < one.bottom; j++) {
        const other = all[j];
        if (one.node === other.node || !overlap(one.quad, other.quad)) continue;
        found.push(`${place(one.element)}: ${one.node.data.trim()} | ${other.node.data.trim()}`);
      }
    });
    return found;
  }

  // [red, green, blue, alpha] in [0, 1] of a computed colour.
  function colour(text) {
    const numbers = text.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
    return [...numbers.slice(0, 3).map((n) => n / 255), numbers[3] ?? 1];
  }

  const over = (top, below) =>
    below.map((value, i) => (i === 3 ? 1 : top[i] * top[3] + value * (1 - top[3])));

  function luminance(rgb) {
    const linear = rgb.slice(0, 3)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }

  function background({ element, quad }) {
    const layers = [];
    for (let e = element.closest("svg") ?? element; e; e = e.parentElement) {
      layers.unshift(colour(getComputedStyle(e).backgroundColor));
    }
    const x = (quad[0].x + quad[2].x) / 2, y = (quad[0].y + quad[2].y) / 2;
    for (const shape of element.ownerSVGElement?.querySelectorAll("rect") ?? []) {
      const box = shape.getBoundingClientRect();
      if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
      const style = getComputedStyle(shape), [r, g, b, alpha] = colour(style.fill);
      layers.push([r, g, b, alpha * style.fillOpacity]);
    }
    return layers.reduce((below, top) => over(top, below), [1, 1, 1, 1]);
  }

  function faint() {
    const found = new Set();
    for (const line of lines()) {
      const style = getComputedStyle(line.element), size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      const below = background(line);
      const ink = over(colour(line.element.ownerSVGElement ? style.fill : style.color), below);
      const [dark, light] = [luminance(ink), luminance(below)].sort((a, b) => a - b);
      const ratio = (light + 0.05) / (dark + 0.05);
      if (ratio < (large ? 3 : 4.5)) {
        found.add(`${ratio.toFixed(2)} ${place(line.element)}: ${line.node.data.trim()}`);
      }
    }
    return [...found];
  }

  window.pageChecks = { overlaps, faint, lines: () => lines().length };
})();
