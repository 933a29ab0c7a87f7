/* Filters and orders the gallery, paints pictures through a window, switches layers.
   Loads nothing: every picture's values stand in a script element of this page (see viewer.py). */
(function () {
  'use strict';
  var gallery = document.querySelector('.cards');
  if (!gallery) return;
  var cards = Array.from(gallery.children);
  var bar = document.querySelector('.filters');

  function make(tag, name, text) {
    var node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  /* --- which cards, in which order ------------------------------------------------------- */

  var fields = ['task', 'modality', 'language', 'class'].map(function (name) {
    return { name: name, select: document.getElementById('f-' + name) };
  });
  var order = document.getElementById('f-order');

  function fits(card) {
    return fields.every(function (field) {
      var wanted = field.select.value;
      if (!wanted) return true;
      if (field.name === 'class') return card.dataset.classes.split(' ').indexOf(wanted) >= 0;
      return card.dataset[field.name] === wanted;
    });
  }

  function apply() {
    var count = 0;
    cards.forEach(function (card) {
      card.hidden = !fits(card);
      if (!card.hidden) count += 1;
    });
    (order.value === 'best' ? cards.slice().reverse() : cards).forEach(function (card) {
      gallery.appendChild(card);
    });
    document.getElementById('f-shown').textContent = count + ' of ' + cards.length + ' shown';
    document.getElementById('f-none').hidden = count > 0;
  }

  fields.forEach(function (field) { field.select.addEventListener('change', apply); });
  order.addEventListener('change', apply);
  document.getElementById('f-reset').addEventListener('click', function () {
    fields.forEach(function (field) { field.select.value = ''; });
    apply();
  });

  /* Layers of all pictures: a class on the gallery hides them. */
  bar.querySelectorAll('input[data-layer]').forEach(function (box) {
    function toggle() { gallery.classList.toggle('no-' + box.dataset.layer, !box.checked); }
    box.addEventListener('change', toggle);
    toggle();
  });

  /* --- pictures -------------------------------------------------------------------------- */

  /* The real values, channel after channel; the inverse of viewer.pack. */
  async function unpack(picture) {
    var bytes = Uint8Array.from(atob(picture.data), function (c) { return c.charCodeAt(0); });
    var stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
    var plain = new Uint8Array(await new Response(stream).arrayBuffer());
    var n = picture.width * picture.height * picture.channels;
    var two = picture.bytes === 2, mask = two ? 65535 : 255;
    var values = new Float32Array(n), code = 0;
    for (var k = 0; k < n; k += 1) {
      var folded = two ? (plain[k] << 8) | plain[n + k] : plain[k];
      if (k % picture.width === 0) code = 0;
      code = (code + ((folded >>> 1) ^ -(folded & 1))) & mask;
      values[k] = picture.low + picture.step * code;
    }
    return values;
  }

  function paint(view) {
    var picture = view.picture, values = view.values, area = picture.width * picture.height;
    var image = view.context.createImageData(picture.width, picture.height);
    var low = view.level - view.width / 2, scale = 255 / Math.max(view.width, 1e-6);
    for (var c = 0; c < 3; c += 1) {
      var from = picture.channels === 3 ? c * area : 0;
      for (var k = 0; k < area; k += 1) {
        image.data[4 * k + c] = (values[from + k] - low) * scale;  /* clamped and rounded */
      }
    }
    for (k = 0; k < area; k += 1) image.data[4 * k + 3] = 255;
    view.context.putImageData(image, 0, 0);
  }

  function shortly(value) {
    return Math.abs(value) >= 100 || Number.isInteger(value) ? String(Math.round(value))
      : value.toPrecision(2);
  }

  /* One slider with its name and its value. */
  function slider(name, low, high, step, changed) {
    var label = make('label', 'slider'), input = make('input'), out = make('output');
    input.type = 'range';
    input.min = low; input.max = high; input.step = step;
    input.addEventListener('input', function () { changed(Number(input.value)); });
    label.append(make('span', '', name), input, out);
    return { label: label, show: function (value, text) { input.value = value; out.value = text; } };
  }

  /* CT is set by width and level in HU, other pictures by contrast and brightness in percent. */
  function controls(view) {
    var picture = view.picture, usual = picture.window, row = make('div', 'controls');
    var choice = null, first, second;

    function set(width, level) {
      view.width = width; view.level = level;
      if (choice) {
        choice.value = Object.keys(picture.windows).find(function (name) {
          return picture.windows[name][0] === width && picture.windows[name][1] === level;
        }) || 'own';
        first.show(width, shortly(width));
        second.show(level, shortly(level));
      } else {
        var contrast = 100 * usual[0] / width, bright = 100 * (usual[1] - level) / usual[0];
        first.show(contrast, Math.round(contrast) + ' %');
        second.show(bright, Math.round(bright) + ' %');
      }
      paint(view);
    }

    if (picture.unit === 'HU') {
      choice = make('select');
      choice.setAttribute('aria-label', 'CT window');
      Object.keys(picture.windows).concat('own').forEach(function (name) {
        var option = make('option', '', name === 'own' ? 'own window' : name + ' ' +
          picture.windows[name].join(' / '));
        option.value = name;
        choice.append(option);
      });
      choice.addEventListener('change', function () {
        var chosen = picture.windows[choice.value];
        if (chosen) set(chosen[0], chosen[1]);
      });
      first = slider('Width', 1, 4000, 1, function (v) { set(v, view.level); });
      second = slider('Level', -1200, 2000, 1, function (v) { set(view.width, v); });
      row.append(choice);
    } else {
      first = slider('Contrast', 25, 400, 1, function (v) { set(usual[0] * 100 / v, view.level); });
      second = slider('Brightness', -100, 100, 1, function (v) {
        set(view.width, usual[1] - v * usual[0] / 100);
      });
    }
    var back = make('button', '', 'Reset');
    back.type = 'button';
    back.addEventListener('click', function () { set(usual[0], usual[1]); });
    row.append(back);
    view.sliders = [first.label, second.label];
    view.set = set;
    return row;
  }

  /* Dragging with a mouse sets the window, as viewers do: across the width, up and down the level.
     The value under the pointer is told. */
  function pointing(view, stage, readout) {
    var start = null;
    stage.addEventListener('pointerdown', function (event) {
      if (event.pointerType !== 'mouse' || event.button !== 0) return;
      start = [event.clientX, event.clientY, view.width, view.level];
      stage.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    stage.addEventListener('pointerup', function () { start = null; });
    stage.addEventListener('dblclick', function () {
      view.set(view.picture.window[0], view.picture.window[1]);
    });
    stage.addEventListener('pointermove', function (event) {
      var picture = view.picture, usual = picture.window[0];
      if (start) {
        view.set(Math.max(usual / 400, start[2] + (event.clientX - start[0]) * usual / 200),
          start[3] + (event.clientY - start[1]) * usual / 300);
      }
      var frame = stage.getBoundingClientRect();
      var x = Math.floor((event.clientX - frame.left) / frame.width * picture.width);
      var y = Math.floor((event.clientY - frame.top) / frame.height * picture.height);
      if (x < 0 || y < 0 || x >= picture.width || y >= picture.height) return;
      var area = picture.width * picture.height, told = [];
      for (var c = 0; c < picture.channels; c += 1) {
        told.push(shortly(view.values[c * area + y * picture.width + x]));
      }
      readout.textContent = told.join(', ') + (picture.unit ? ' ' + picture.unit : '');
    });
    stage.addEventListener('pointerleave', function () { readout.textContent = ''; });
  }

  /* One button per class that is drawn here: it hides that class's layers. */
  function chips(stage) {
    var found = new Map(), row = make('div', 'chips');
    stage.querySelectorAll('[data-class]').forEach(function (layer) {
      var name = layer.dataset.class;
      if (!found.has(name)) found.set(name, []);
      found.get(name).push(layer);
    });
    found.forEach(function (layers, name) {
      var label = document.querySelector('#f-class option[value="' + CSS.escape(name) + '"]');
      var chip = make('button', 'chip', label ? label.textContent : name.replace(/_/g, ' '));
      chip.type = 'button';
      chip.dataset.class = name;
      ['p', 'r'].forEach(function (side) {
        if (layers.some(function (l) { return l.classList.contains(side); })) {
          chip.prepend(make('i', side));
        }
      });
      chip.setAttribute('aria-pressed', 'true');
      chip.addEventListener('click', function () {
        var on = chip.getAttribute('aria-pressed') !== 'true';
        chip.setAttribute('aria-pressed', String(on));
        layers.forEach(function (layer) { layer.classList.toggle('off', !on); });
      });
      row.append(chip);
    });
    row.hidden = found.size === 0;
    return row;
  }

  async function open(card) {
    var source = document.getElementById('px-' + card.dataset.picture);
    if (!source || card.dataset.open) return;
    card.dataset.open = 'yes';
    var picture = JSON.parse(source.textContent), stage = card.querySelector('.stage');
    var canvas = make('canvas');
    canvas.width = picture.width; canvas.height = picture.height;
    var view = { picture: picture, context: canvas.getContext('2d'),
      values: await unpack(picture) };
    var readout = make('span', 'readout'), wide = make('button', '', 'Enlarge');
    wide.type = 'button';
    wide.addEventListener('click', function () {
      var on = card.classList.toggle('wide');
      wide.textContent = on ? 'Smaller' : 'Enlarge';
      if (on) card.scrollIntoView({ block: 'start' });
    });
    var row = controls(view);
    row.append(wide);
    var drawn = card.querySelector('a.drawn');
    if (drawn) {
      var link = make('a', '', 'PNG');
      link.href = drawn.getAttribute('href');
      link.title = 'the picture as it was drawn';
      row.append(link);
      canvas.setAttribute('role', 'img');
      canvas.setAttribute('aria-label', drawn.firstElementChild.alt);
    }
    row.append.apply(row, view.sliders);
    stage.prepend(canvas);
    stage.append(readout);
    stage.after(row, chips(stage));
    view.set(picture.window[0], picture.window[1]);
    pointing(view, stage, readout);
    card.classList.add('live');
  }

  if (!('DecompressionStream' in window)) {
    document.getElementById('f-old').hidden = false;  /* the drawn pictures stay */
  } else {
    /* A picture is unpacked when it comes near the window: a gallery may hold a hundred. */
    var near = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        if (!entry.isIntersecting) return;
        near.unobserve(entry.target);
        open(entry.target);
      });
    }, { rootMargin: '600px' });
    cards.forEach(function (card) { near.observe(card); });
  }
  bar.hidden = false;
  apply();
})();
